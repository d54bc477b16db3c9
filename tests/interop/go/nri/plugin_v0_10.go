//go:build nri_v0_10

package main

import (
	"context"
	"errors"

	"github.com/containerd/nri/pkg/api"
	"google.golang.org/protobuf/proto"
)

// What NRI v0.10 added.

func (p *plugin) UpdatePodSandbox(_ context.Context, pod *api.PodSandbox, overhead, resources *api.LinuxResources) error {
	return p.heard("UpdatePodSandbox", map[string]proto.Message{"pod": pod, "overhead": overhead, "resources": resources})
}

func (p *plugin) PostUpdatePodSandbox(_ context.Context, pod *api.PodSandbox) error {
	return p.heard("PostUpdatePodSandbox", map[string]proto.Message{"pod": pod})
}

func (p *plugin) ValidateContainerAdjustment(_ context.Context, request *api.ValidateContainerAdjustmentRequest) error {
	if err := p.heard("ValidateContainerAdjustment", map[string]proto.Message{"request": request}); err != nil {
		return err
	}
	if p.Reject != "" {
		return errors.New(p.Reject)
	}
	return nil
}
