package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/nri/pkg/adaptation"
	"github.com/containerd/nri/pkg/api"
	"google.golang.org/protobuf/proto"
)

type runtimeCommand struct {
	Do string `json:"do"`
	// start
	Name                  string `json:"name"`
	Version               string `json:"version"`
	PluginPath            string `json:"plugin_path"`
	ConfigPath            string `json:"config_path"`
	RegistrationTimeoutMS int    `json:"registration_timeout_ms"`
	RequestTimeoutMS      int    `json:"request_timeout_ms"`
	// state: what a plugin is synchronized with, given or made up
	Pods           []json.RawMessage `json:"pods"`
	Containers     []json.RawMessage `json:"containers"`
	PodCount       int               `json:"pod_count"`
	ContainerCount int               `json:"container_count"`
	PadBytes       int               `json:"pad_bytes"`
	FailUpdates    []string          `json:"fail_updates"` // ids of containers whose updates fail
	// call, bench
	Method  string          `json:"method"`
	Request json.RawMessage `json:"request"`
	Count   int             `json:"count"`
}

// node is what the runtime knows of its containers.
type node struct {
	sync.Mutex
	pods       []*api.PodSandbox
	containers []*api.Container
	fail       []string
}

func (n *node) set(wanted *runtimeCommand) {
	n.Lock()
	defer n.Unlock()
	n.pods = readAll(wanted.Pods, func() *api.PodSandbox { return &api.PodSandbox{} })
	n.containers = readAll(wanted.Containers, func() *api.Container { return &api.Container{} })
	n.fail = wanted.FailUpdates
	for i := 0; i < wanted.PodCount; i++ {
		n.pods = append(n.pods, &api.PodSandbox{Id: fmt.Sprintf("pod%d", i), Name: fmt.Sprintf("name%d", i), Namespace: "default"})
	}
	for i := 0; i < wanted.ContainerCount; i++ {
		n.containers = append(n.containers, &api.Container{
			Id:           fmt.Sprintf("ctr%d", i),
			PodSandboxId: fmt.Sprintf("pod%d", i%max(1, wanted.PodCount)),
			Name:         "c",
			State:        api.ContainerState_CONTAINER_RUNNING,
			Annotations:  map[string]string{"pad": strings.Repeat("x", wanted.PadBytes)},
		})
	}
}

func (n *node) synchronize(ctx context.Context, tell adaptation.SyncCB) error {
	n.Lock()
	pods, containers := n.pods, n.containers
	n.Unlock()
	began := time.Now()
	updates, err := tell(ctx, pods, containers)
	record := map[string]any{"event": "synchronized", "updates": writtenAll(updates), "seconds": time.Since(began).Seconds()}
	if err != nil {
		record["error"] = err.Error()
	}
	say(record)
	return err
}

func (n *node) update(_ context.Context, updates []*api.ContainerUpdate) ([]*api.ContainerUpdate, error) {
	n.Lock()
	defer n.Unlock()
	var failed []*api.ContainerUpdate
	for _, update := range updates {
		if slices.Contains(n.fail, update.ContainerId) {
			failed = append(failed, update)
		}
	}
	say(map[string]any{"event": "update", "updates": writtenAll(updates)})
	return failed, nil
}

func runRuntime(socket string) {
	state := new(node)
	var runtime *adaptation.Adaptation
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 64<<20)
	for lines.Scan() {
		wanted := new(runtimeCommand)
		if err := json.Unmarshal(lines.Bytes(), wanted); err != nil {
			fail(err)
		}
		answer := map[string]any{"answer": wanted.Do}
		var err error
		switch wanted.Do {
		case "state":
			state.set(wanted)
		case "start":
			runtime, err = start(socket, wanted, state)
		case "call":
			var response proto.Message
			began := time.Now()
			if response, err = call(runtime, wanted.Method, wanted.Request); response != nil {
				answer["response"] = written(response)
			}
			answer["seconds"] = time.Since(began).Seconds()
		case "bench":
			var microseconds []float64
			if microseconds, err = bench(runtime, wanted); err == nil {
				answer["microseconds"] = microseconds
			}
		case "stop":
			runtime.Stop()
		default:
			fail(fmt.Errorf("unknown command %q", wanted.Do))
		}
		if err != nil {
			answer["error"] = err.Error()
		}
		say(answer)
	}
}

func start(socket string, wanted *runtimeCommand, state *node) (*adaptation.Adaptation, error) {
	if wanted.RegistrationTimeoutMS > 0 {
		adaptation.SetPluginRegistrationTimeout(time.Duration(wanted.RegistrationTimeoutMS) * time.Millisecond)
	}
	if wanted.RequestTimeoutMS > 0 {
		adaptation.SetPluginRequestTimeout(time.Duration(wanted.RequestTimeoutMS) * time.Millisecond)
	}
	runtime, err := adaptation.New(wanted.Name, wanted.Version, state.synchronize, state.update,
		adaptation.WithSocketPath(socket),
		adaptation.WithPluginPath(wanted.PluginPath),
		adaptation.WithPluginConfigPath(wanted.ConfigPath))
	if err != nil {
		return nil, err
	}
	return runtime, runtime.Start()
}

// call calls a method by its name: releases before v0.12 take other messages for most of them, of the same fields.
func call(runtime *adaptation.Adaptation, name string, text json.RawMessage) (proto.Message, error) {
	method := reflect.ValueOf(runtime).MethodByName(name)
	if !method.IsValid() {
		return nil, fmt.Errorf("this release has no %s", name)
	}
	request := reflect.New(method.Type().In(1).Elem())
	read(text, request.Interface().(proto.Message))
	results := method.Call([]reflect.Value{reflect.ValueOf(context.Background()), request})
	err, _ := results[len(results)-1].Interface().(error)
	if len(results) == 1 || err != nil {
		return nil, err
	}
	return results[0].Interface().(proto.Message), nil
}

// bench times CreateContainer, one after the other.
func bench(runtime *adaptation.Adaptation, wanted *runtimeCommand) ([]float64, error) {
	var microseconds []float64
	for i := 0; i < wanted.Count; i++ {
		request := read(wanted.Request, &api.CreateContainerRequest{}) // a fresh one: NRI changes it
		began := time.Now()
		if _, err := runtime.CreateContainer(context.Background(), request); err != nil {
			return nil, err
		}
		microseconds = append(microseconds, float64(time.Since(began).Nanoseconds())/1000)
	}
	return microseconds, nil
}
