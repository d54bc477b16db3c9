package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"net"
	"strconv"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

type bytesHandler func(ctx context.Context, payload []byte) ([]byte, error)

func unary(handler bytesHandler) ttrpc.Method {
	return func(ctx context.Context, unmarshal func(any) error) (any, error) {
		request := new(wrapperspb.BytesValue)
		if err := unmarshal(request); err != nil {
			return nil, err
		}
		payload, err := handler(ctx, request.Value)
		if err != nil {
			return nil, err
		}
		return wrapperspb.Bytes(payload), nil
	}
}

func receive(stream ttrpc.StreamServer) ([]byte, error) {
	message := new(wrapperspb.BytesValue)
	if err := stream.RecvMsg(message); err != nil {
		return nil, err
	}
	return message.Value, nil
}

func serve(listener net.Listener) error {
	server, err := ttrpc.NewServer()
	if err != nil {
		return err
	}
	server.RegisterService(service, &ttrpc.ServiceDesc{
		Methods: map[string]ttrpc.Method{
			"Echo":     unary(echo),
			"Sleep":    unary(sleep),
			"Deadline": unary(deadline),
			"Metadata": unary(metadata),
			"Fail":     unary(failWith),
			"Zeros":    unary(zeros),
		},
		Streams: map[string]ttrpc.Stream{
			"Count": {Handler: count, StreamingServer: true},
			"Sum":   {Handler: sum, StreamingClient: true},
			"Chat":  {Handler: chat, StreamingClient: true, StreamingServer: true},
		},
	})
	return server.Serve(context.Background(), listener)
}

func echo(_ context.Context, payload []byte) ([]byte, error) { return payload, nil }

// sleep waits for as many milliseconds as the payload says in decimal, or for the end of the caller's time.
func sleep(ctx context.Context, payload []byte) ([]byte, error) {
	milliseconds, err := strconv.Atoi(string(payload))
	if err != nil {
		return nil, err
	}
	select {
	case <-time.After(time.Duration(milliseconds) * time.Millisecond):
		return payload, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// deadline answers with the nanoseconds left, or "none".
func deadline(ctx context.Context, _ []byte) ([]byte, error) {
	end, ok := ctx.Deadline()
	if !ok {
		return []byte("none"), nil
	}
	return strconv.AppendInt(nil, time.Until(end).Nanoseconds(), 10), nil
}

func metadata(ctx context.Context, _ []byte) ([]byte, error) {
	found, _ := ttrpc.GetMetadata(ctx)
	return json.Marshal(found)
}

// failWith ends the call with the code that the payload says in decimal; 0 is a plain Go error.
func failWith(_ context.Context, payload []byte) ([]byte, error) {
	code, err := strconv.Atoi(string(payload))
	if err != nil {
		return nil, err
	}
	if code == 0 {
		return nil, errors.New("a plain error")
	}
	return nil, status.Errorf(codes.Code(code), "as asked: %d", code)
}

// zeros answers with as many zero bytes as the payload says in decimal.
func zeros(_ context.Context, payload []byte) ([]byte, error) {
	size, err := strconv.Atoi(string(payload))
	if err != nil {
		return nil, err
	}
	return make([]byte, size), nil
}

// count sends the numbers from 0 up to the request's, decimal; one that ends in "!" fails in the end.
func count(_ context.Context, stream ttrpc.StreamServer) (any, error) {
	request, err := receive(stream)
	if err != nil {
		return nil, err
	}
	text, broken := string(request), false
	if text[len(text)-1] == '!' {
		text, broken = text[:len(text)-1], true
	}
	end, err := strconv.Atoi(text)
	if err != nil {
		return nil, err
	}
	for number := 0; number < end; number++ {
		if err := stream.SendMsg(wrapperspb.Bytes(strconv.AppendInt(nil, int64(number), 10))); err != nil {
			return nil, err
		}
	}
	if broken {
		return nil, status.Error(codes.Aborted, "broken off")
	}
	return nil, nil
}

// sum answers with the number of messages and of bytes, big-endian 64 bits each.
func sum(_ context.Context, stream ttrpc.StreamServer) (any, error) {
	var messages, size uint64
	for {
		payload, err := receive(stream)
		if errors.Is(err, io.EOF) {
			answer := binary.BigEndian.AppendUint64(nil, messages)
			return wrapperspb.Bytes(binary.BigEndian.AppendUint64(answer, size)), nil
		}
		if err != nil {
			return nil, err
		}
		messages, size = messages+1, size+uint64(len(payload))
	}
}

// chat sends every message back.
func chat(_ context.Context, stream ttrpc.StreamServer) (any, error) {
	for {
		payload, err := receive(stream)
		if errors.Is(err, io.EOF) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		if err := stream.SendMsg(wrapperspb.Bytes(payload)); err != nil {
			return nil, err
		}
	}
}
