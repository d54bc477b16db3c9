//go:build !nri_v0_12_4

package main

import "github.com/containerd/nri/pkg/stub"

func (p *plugin) moreOptions() []stub.Option {
	return nil
}
