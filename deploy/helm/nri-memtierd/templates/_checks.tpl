{{- /* What a schema cannot say, or not in words: each is one clear error. */ -}}
{{- define "nri-memtierd.checks" -}}
{{- include "nri-memtierd.checkClasses" . }}
{{- include "nri-memtierd.checkOutputDir" . }}
{{- range .Values.capabilities }}
{{- if hasPrefix "CAP_" . }}{{ fail (printf "capabilities: %s: Kubernetes' names have no CAP_: write %s" . (trimPrefix "CAP_" .)) }}{{ end }}
{{- end }}
{{- range $key := list "app.kubernetes.io/name" "app.kubernetes.io/instance" }}
{{- if hasKey ($.Values.podLabels | default dict) $key }}
{{- fail (printf "podLabels: %s is how the DaemonSet finds its pods, the chart sets it: take it out" $key) }}
{{- end }}
{{- end }}
{{- $surge := ((.Values.updateStrategy | default dict).rollingUpdate | default dict).maxSurge }}
{{- if not (has (toString $surge) (list "0" "0%" "<nil>")) }}
{{- fail (printf "updateStrategy.rollingUpdate.maxSurge is %v: a second plugin on a node ends while the first one runs, which would wait for the second: use maxUnavailable" $surge) }}
{{- end }}
{{- if has ".." (splitList "/" (.Values.seccompLocalhostProfile | default "")) }}
{{- fail (printf "seccompLocalhostProfile is %q: give a path below /var/lib/kubelet/seccomp without .." .Values.seccompLocalhostProfile) }}
{{- end }}
{{- end }}

{{- define "nri-memtierd.checkClasses" -}}
{{- $first := dict }}
{{- range $index, $class := .Values.classes }}
{{- if hasKey $first .name }}
{{- fail (printf "classes[%d].name is %q, as that of classes[%v]: give each class a name of its own" $index .name (get $first .name)) }}
{{- end }}
{{- $_ := set $first .name $index }}
{{- end }}
{{- end }}

{{- /* The same directories as in memtier_cli/nri_memtierd/runpath.py; a test compares. */ -}}
{{- define "nri-memtierd.checkOutputDir" -}}
{{- with .Values.outputDir }}
{{- if not (hasPrefix "/" .) }}
{{- fail (printf "outputDir is %q: give an absolute path of the node, like /var/log/nri-memtierd" .) }}
{{- end }}
{{- $path := clean . }}
{{- $exact := list "/" "/dev/shm" "/home" "/media" "/mnt" "/opt" "/root" "/run" "/run/lock" "/run/memtier" "/run/nri" "/srv" "/tmp" "/var" "/var/cache" "/var/lib" "/var/lock" "/var/log" "/var/run" "/var/run/lock" "/var/run/memtier" "/var/run/nri" "/var/spool" "/var/tmp" }}
{{- $why := ternary "is a directory of the system" "" (has $path $exact) }}
{{- if not (or $why (hasPrefix "/dev/shm/" $path)) }}
{{- range list "/bin" "/boot" "/dev" "/etc" "/lib" "/lib32" "/lib64" "/libx32" "/proc" "/sbin" "/sys" "/usr" }}
{{- if hasPrefix (printf "%s/" .) (printf "%s/" $path) }}{{ $why = printf "is in %s, which is the system's" . }}{{ end }}
{{- end }}
{{- end }}
{{- if $why }}
{{- fail (printf "outputDir is %q, which %s: give one for the plugin, like /var/log/nri-memtierd" . $why) }}
{{- end }}
{{- end }}
{{- end }}
