// NRI peers for the interop tests, on containerd/nri's own code: `peer runtime SOCKET` is a container runtime without
// containers, `peer plugin SOCKET [SETTINGS]` a plugin on NRI's stub.
//
// Commands come as JSON lines on standard input, what happens goes as JSON lines to standard output, NRI's log to
// standard error. NRI messages are in protobuf's JSON form: one source serves all releases.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"sync"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

var printing sync.Mutex

func say(record map[string]any) {
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

// read fills a message from its JSON form. Fields that this release does not have are left out.
func read[M proto.Message](text json.RawMessage, message M) M {
	if len(text) == 0 {
		return message
	}
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(text, message); err != nil {
		fail(err)
	}
	return message
}

func readAll[M proto.Message](texts []json.RawMessage, empty func() M) []M {
	var messages []M
	for _, text := range texts {
		messages = append(messages, read(text, empty()))
	}
	return messages
}

func written(message proto.Message) json.RawMessage {
	text, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(message)
	if err != nil {
		fail(err)
	}
	return text
}

func writtenAll[M proto.Message](messages []M) []json.RawMessage {
	texts := []json.RawMessage{}
	for _, message := range messages {
		texts = append(texts, written(message))
	}
	return texts
}

func main() {
	if len(os.Args) < 3 {
		fail(fmt.Errorf("usage: peer runtime SOCKET | peer plugin SOCKET [SETTINGS]"))
	}
	switch os.Args[1] {
	case "runtime":
		runRuntime(os.Args[2])
	case "plugin":
		settings := "{}"
		if len(os.Args) > 3 {
			settings = os.Args[3]
		}
		runPlugin(os.Args[2], settings)
	default:
		fail(fmt.Errorf("unknown role %q", os.Args[1]))
	}
}
