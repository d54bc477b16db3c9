// A ttrpc peer for the interop tests: `peer server SOCKET` serves, `peer client SOCKET` makes the calls it is told.
//
// Commands come as JSON lines on standard input, results go as JSON lines to standard output. Messages are
// google.protobuf.BytesValue, so neither side needs generated code; in JSON their contents are base64.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
)

const service = "memtier.interop.v1.Probe"

var printing sync.Mutex

func say(record any) {
	line, err := json.Marshal(record)
	if err != nil {
		fail(err)
	}
	printing.Lock()
	defer printing.Unlock()
	os.Stdout.Write(append(line, '\n'))
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

func main() {
	if len(os.Args) != 3 {
		fail(fmt.Errorf("usage: peer server|client SOCKET"))
	}
	switch os.Args[1] {
	case "server":
		listener, err := net.Listen("unix", os.Args[2])
		if err != nil {
			fail(err)
		}
		go func() { fail(serve(listener)) }()
		say(map[string]any{"event": "listening"})
		io.Copy(io.Discard, os.Stdin) // until whoever started us closes it
	case "client":
		conn, err := net.Dial("unix", os.Args[2])
		if err != nil {
			fail(err)
		}
		if err := obey(conn, bufio.NewScanner(os.Stdin)); err != nil {
			fail(err)
		}
	default:
		fail(fmt.Errorf("unknown role %q", os.Args[1]))
	}
}
