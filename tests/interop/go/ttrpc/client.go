package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

type command struct {
	ID              int                 `json:"id"`
	Service         string              `json:"service"`
	Method          string              `json:"method"`
	Payload         []byte              `json:"payload"`
	TimeoutMS       int                 `json:"timeout_ms"`
	Metadata        map[string][]string `json:"metadata"`
	StreamingClient bool                `json:"streaming_client"`
	StreamingServer bool                `json:"streaming_server"`
	Messages        [][]byte            `json:"messages"`
	InTurn          bool                `json:"in_turn"` // wait for an answer to each message before the next
}

type result struct {
	ID       int      `json:"id"`
	Payload  []byte   `json:"payload,omitempty"`
	Messages [][]byte `json:"messages,omitempty"`
	Code     int      `json:"code"` // gRPC code; 2 also for errors that are no status
	Error    string   `json:"error,omitempty"`
	Closed   bool     `json:"closed,omitempty"`
	Seconds  float64  `json:"seconds"`
}

// obey makes the calls of the lines, each in a goroutine of its own.
func obey(conn net.Conn, lines *bufio.Scanner) error {
	client := ttrpc.NewClient(conn, ttrpc.WithOnClose(func() { say(map[string]any{"event": "closed"}) }))
	lines.Buffer(nil, 32<<20)
	for lines.Scan() {
		var wanted command
		if err := json.Unmarshal(lines.Bytes(), &wanted); err != nil {
			return err
		}
		go func() {
			began := time.Now()
			found := result{ID: wanted.ID}
			if err := perform(client, &wanted, &found); err != nil {
				found.Code, found.Error = int(status.Code(err)), err.Error()
				found.Closed = errors.Is(err, ttrpc.ErrClosed)
				if errors.Is(err, context.DeadlineExceeded) {
					found.Code = 4
				}
			}
			found.Seconds = time.Since(began).Seconds()
			say(found)
		}()
	}
	return lines.Err()
}

func perform(client *ttrpc.Client, wanted *command, found *result) error {
	ctx := context.Background()
	if wanted.TimeoutMS != 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(wanted.TimeoutMS)*time.Millisecond)
		defer cancel()
	}
	if wanted.Metadata != nil {
		ctx = ttrpc.WithMetadata(ctx, ttrpc.MD(wanted.Metadata))
	}
	name := wanted.Service
	if name == "" {
		name = service
	}
	if !wanted.StreamingClient && !wanted.StreamingServer {
		answer := new(wrapperspb.BytesValue)
		if err := client.Call(ctx, name, wanted.Method, wrapperspb.Bytes(wanted.Payload), answer); err != nil {
			return err
		}
		found.Payload = answer.Value
		return nil
	}
	return performStream(ctx, client, name, wanted, found)
}

func performStream(ctx context.Context, client *ttrpc.Client, name string, wanted *command, found *result) error {
	var request any
	if !wanted.StreamingClient {
		request = wrapperspb.Bytes(wanted.Payload)
	}
	desc := &ttrpc.StreamDesc{StreamingClient: wanted.StreamingClient, StreamingServer: wanted.StreamingServer}
	stream, err := client.NewStream(ctx, desc, name, wanted.Method, request)
	if err != nil {
		return err
	}
	receive := func() error {
		message := new(wrapperspb.BytesValue)
		if err := stream.RecvMsg(message); err != nil {
			return err
		}
		found.Messages = append(found.Messages, message.Value)
		return nil
	}
	if wanted.StreamingClient {
		for _, message := range wanted.Messages {
			if err := stream.SendMsg(wrapperspb.Bytes(message)); err != nil {
				return err
			}
			if wanted.InTurn {
				if err := receive(); err != nil {
					return err
				}
			}
		}
		if err := stream.CloseSend(); err != nil {
			return err
		}
	}
	for {
		if err := receive(); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if !wanted.StreamingServer { // one answer, no end to wait for
			return nil
		}
	}
}
