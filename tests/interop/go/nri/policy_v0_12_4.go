//go:build nri_v0_12_4

package main

import (
	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
)

// What NRI v0.12.4 added.

func (p *plugin) moreOptions() []stub.Option {
	if p.FailRequest || p.KeepConnected {
		return []stub.Option{stub.WithFailurePolicy(&api.FailurePolicy{FailRequest: p.FailRequest, KeepConnected: p.KeepConnected})}
	}
	return nil
}
