package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"os"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	"google.golang.org/protobuf/proto"
)

type plugin struct {
	Name      string                     `json:"name"`
	Index     string                     `json:"index"`
	Quiet     bool                       `json:"quiet"`
	Adjust    json.RawMessage            `json:"adjust"`
	Updates   map[string]json.RawMessage `json:"updates"`  // by method: the update in its answer
	Failures  map[string]string          `json:"failures"` // by method: the text of the error in its answer
	DelayMS   map[string]int             `json:"delay_ms"` // by method
	Reject    string                     `json:"reject"`   // the reason for which adjustments are refused
	EventMask int32                      `json:"event_mask"`

	FailRequest   bool `json:"fail_request"`
	KeepConnected bool `json:"keep_connected"`
}

// heard tells of a call and does what the settings say of it.
func (p *plugin) heard(method string, parts map[string]proto.Message) error {
	if !p.Quiet {
		record := map[string]any{"event": method}
		for name, part := range parts {
			record[name] = written(part)
		}
		say(record)
	}
	time.Sleep(time.Duration(p.DelayMS[method]) * time.Millisecond)
	if text, ok := p.Failures[method]; ok {
		return errors.New(text)
	}
	return nil
}

func (p *plugin) heardContainer(method string, pod *api.PodSandbox, container *api.Container) error {
	return p.heard(method, map[string]proto.Message{"pod": pod, "container": container})
}

func (p *plugin) updates(method string) []*api.ContainerUpdate {
	if text, ok := p.Updates[method]; ok {
		return []*api.ContainerUpdate{read(text, &api.ContainerUpdate{})}
	}
	return nil
}

func (p *plugin) Configure(_ context.Context, config, runtime, version string) (api.EventMask, error) {
	say(map[string]any{"event": "Configure", "config": config, "runtime": runtime, "version": version})
	return api.EventMask(p.EventMask), nil
}

func (p *plugin) Synchronize(_ context.Context, pods []*api.PodSandbox, containers []*api.Container) ([]*api.ContainerUpdate, error) {
	record := map[string]any{"event": "Synchronize", "pods": len(pods), "containers": len(containers)}
	if len(containers) > 0 {
		record["first"], record["last"] = written(containers[0]), written(containers[len(containers)-1])
	}
	say(record)
	return p.updates("Synchronize"), nil
}

func (p *plugin) RunPodSandbox(_ context.Context, pod *api.PodSandbox) error {
	return p.heard("RunPodSandbox", map[string]proto.Message{"pod": pod})
}

func (p *plugin) StopPodSandbox(_ context.Context, pod *api.PodSandbox) error {
	return p.heard("StopPodSandbox", map[string]proto.Message{"pod": pod})
}

func (p *plugin) RemovePodSandbox(_ context.Context, pod *api.PodSandbox) error {
	return p.heard("RemovePodSandbox", map[string]proto.Message{"pod": pod})
}

func (p *plugin) CreateContainer(_ context.Context, pod *api.PodSandbox, container *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	if err := p.heardContainer("CreateContainer", pod, container); err != nil {
		return nil, nil, err
	}
	return read(p.Adjust, &api.ContainerAdjustment{}), p.updates("CreateContainer"), nil
}

func (p *plugin) PostCreateContainer(_ context.Context, pod *api.PodSandbox, container *api.Container) error {
	return p.heardContainer("PostCreateContainer", pod, container)
}

func (p *plugin) StartContainer(_ context.Context, pod *api.PodSandbox, container *api.Container) error {
	return p.heardContainer("StartContainer", pod, container)
}

func (p *plugin) PostStartContainer(_ context.Context, pod *api.PodSandbox, container *api.Container) error {
	return p.heardContainer("PostStartContainer", pod, container)
}

func (p *plugin) UpdateContainer(_ context.Context, pod *api.PodSandbox, container *api.Container, resources *api.LinuxResources) ([]*api.ContainerUpdate, error) {
	parts := map[string]proto.Message{"pod": pod, "container": container, "resources": resources}
	return p.updates("UpdateContainer"), p.heard("UpdateContainer", parts)
}

func (p *plugin) PostUpdateContainer(_ context.Context, pod *api.PodSandbox, container *api.Container) error {
	return p.heardContainer("PostUpdateContainer", pod, container)
}

func (p *plugin) StopContainer(_ context.Context, pod *api.PodSandbox, container *api.Container) ([]*api.ContainerUpdate, error) {
	return p.updates("StopContainer"), p.heardContainer("StopContainer", pod, container)
}

func (p *plugin) RemoveContainer(_ context.Context, pod *api.PodSandbox, container *api.Container) error {
	return p.heardContainer("RemoveContainer", pod, container)
}

func runPlugin(socket, settings string) {
	implementation := new(plugin)
	if err := json.Unmarshal([]byte(settings), implementation); err != nil {
		fail(err)
	}
	options := append(implementation.moreOptions(),
		stub.WithSocketPath(socket),
		stub.WithPluginName(implementation.Name),
		stub.WithPluginIdx(implementation.Index),
		stub.WithOnClose(func() { say(map[string]any{"event": "closed"}) }))
	running, err := stub.New(implementation, options...)
	if err != nil {
		fail(err)
	}
	go func() {
		err := running.Run(context.Background())
		record := map[string]any{"event": "ended"}
		if err != nil {
			record["error"] = err.Error()
		}
		say(record)
	}()
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 64<<20)
	for lines.Scan() {
		wanted := struct {
			Do      string            `json:"do"`
			Updates []json.RawMessage `json:"updates"`
		}{}
		if err := json.Unmarshal(lines.Bytes(), &wanted); err != nil {
			fail(err)
		}
		answer := map[string]any{"answer": wanted.Do}
		switch wanted.Do {
		case "update":
			failed, err := running.UpdateContainers(readAll(wanted.Updates, func() *api.ContainerUpdate { return &api.ContainerUpdate{} }))
			answer["failed"] = writtenAll(failed)
			if err != nil {
				answer["error"] = err.Error()
			}
		case "stop":
			running.Stop()
		}
		say(answer)
	}
}
