{{- define "nri-memtierd.selector" -}}
app.kubernetes.io/name: nri-memtierd
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "nri-memtierd.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" | quote }}
{{ include "nri-memtierd.selector" . }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
{{- end }}

{{- /* Images. Name, tag and pull policy belong together: what is built here is nowhere but where you put it. */ -}}
{{- define "nri-memtierd.ownName" }}localhost/memtier/nri-memtierd{{ end }}
{{- define "nri-memtierd.imageName" -}}
{{- (.Values.image | default dict).name | default (include "nri-memtierd.ownName" .) }}
{{- end }}

{{- define "nri-memtierd.isGoPlugin" -}}
{{- if regexMatch "(^|/)containers/nri-plugins/nri-memtierd([:@].*)?$" (include "nri-memtierd.imageName" .) }}true{{ end }}
{{- end }}

{{- define "nri-memtierd.image" -}}
{{- $name := include "nri-memtierd.imageName" . }}
{{- $tag := (.Values.image | default dict).tag | default "" }}
{{- if include "nri-memtierd.isGoPlugin" . }}
{{- printf "%s:%s" (include "nri-memtierd.ownName" .) .Chart.AppVersion }}
{{- else if regexMatch "(:[^/]*|@.*)$" $name }}
{{- if $tag }}{{ fail (printf "image.tag is %q, but image.name %q has a tag or digest already: leave one of them out" $tag $name) }}{{ end }}
{{- $name }}
{{- else if $tag }}
{{- printf "%s:%s" $name $tag }}
{{- else if eq $name (include "nri-memtierd.ownName" .) }}
{{- printf "%s:%s" $name .Chart.AppVersion }}
{{- else }}
{{- fail (printf "image.name is %q, but image.tag is not set: say which of that image's tags it is (what `make images` builds has the tag %s)" $name .Chart.AppVersion) }}
{{- end }}
{{- end }}

{{- define "nri-memtierd.pullPolicy" -}}
{{- if include "nri-memtierd.isGoPlugin" . }}IfNotPresent{{ else }}{{ (.Values.image | default dict).pullPolicy | default "IfNotPresent" }}{{ end }}
{{- end }}

{{- /* The directory on the node that outputDir stands for. */ -}}
{{- define "nri-memtierd.outputDir" -}}
{{- with .Values.outputDir }}
{{- if eq (base (clean .)) "nri-memtierd" }}{{ clean . }}{{ else }}{{ clean (printf "%s/nri-memtierd" .) }}{{ end }}
{{- end }}
{{- end }}

{{- /* Directories where anyone can put a link: the program makes its own below them, so that no link is followed. */ -}}
{{- define "nri-memtierd.publicDir" -}}
{{- $path := include "nri-memtierd.outputDir" . }}
{{- range list "/tmp" "/var/tmp" "/dev/shm" "/run/lock" "/var/lock" "/var/run/lock" }}{{ if hasPrefix (printf "%s/" .) $path }}{{ . }}{{ end }}{{ end }}
{{- end }}

{{- define "nri-memtierd.runDir" -}}
{{- if not .Values.outputDir }}/var/run/nri-memtierd
{{- else if include "nri-memtierd.publicDir" . }}/run-dir{{ trimPrefix (include "nri-memtierd.publicDir" .) (include "nri-memtierd.outputDir" .) | replace "$(" "$$(" }}
{{- else }}/run-dir
{{- end }}
{{- end }}

{{- /* A number or a string as text; a large number without an exponent. */ -}}
{{- define "nri-memtierd.quantity" -}}
{{- if kindIs "string" . }}{{ . | quote }}{{ else }}{{ toJson . | quote }}{{ end }}
{{- end }}

{{- define "nri-memtierd.number" -}}
{{- $text := ternary . (toJson .) (kindIs "string" .) }}
{{- $digits := regexFind "^[0-9.]+([eE][-+]?[0-9]+)?" $text }}
{{- $factors := dict "" 1 "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "E" 1e18 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 "Pi" 1125899906842624 "Ei" 1152921504606846976 }}
{{- mulf (float64 $digits) (get $factors (trimPrefix $digits $text)) }}
{{- end }}

{{- /* (limit, request): the limit, or the request where that is more, as values from a chart without limits may ask. */ -}}
{{- define "nri-memtierd.limit" -}}
{{- $limit := index . 0 }}
{{- $request := index . 1 | default "0" }}
{{- $more := gt (float64 (include "nri-memtierd.number" $request)) (float64 (include "nri-memtierd.number" $limit)) }}
{{- include "nri-memtierd.quantity" (ternary $request $limit $more) }}
{{- end }}

{{- define "nri-memtierd.priorityClassName" -}}
{{- if .Values.priorityClassName }}{{ .Values.priorityClassName }}
{{- else if ne (toString .Values.podPriorityClassNodeCritical) "false" }}system-node-critical{{ end }}
{{- end }}

{{- /* Values that were null, or that an older release does not have (`helm upgrade --reuse-values`): as in values.yaml. */ -}}
{{- define "nri-memtierd.capabilities" -}}
{{- $given := .Values.capabilities }}
{{- toYaml (ternary (list "DAC_OVERRIDE" "SYS_ADMIN" "SYS_NICE" "SYS_PTRACE") $given (kindIs "invalid" $given)) }}
{{- end }}

{{- define "nri-memtierd.appArmorProfile" -}}
{{- ternary "Unconfined" .Values.appArmorProfile (kindIs "invalid" .Values.appArmorProfile) }}
{{- end }}

{{- define "nri-memtierd.seccompProfile" -}}
{{- ternary "RuntimeDefault" .Values.seccompProfile (kindIs "invalid" .Values.seccompProfile) }}
{{- end }}

{{- define "nri-memtierd.verbosity" -}}
{{- ternary 1 .Values.verbosity (kindIs "invalid" .Values.verbosity) }}
{{- end }}

{{- define "nri-memtierd.appArmorIsAField" -}}
{{- if semverCompare ">=1.30.0-0" .Capabilities.KubeVersion.Version }}true{{ end }}
{{- end }}

{{- define "nri-memtierd.podAnnotations" -}}
{{- $annotations := dict }}
{{- $profile := include "nri-memtierd.appArmorProfile" . }}
{{- if and $profile (not .Values.privileged) (not (include "nri-memtierd.appArmorIsAField" .)) }}
{{- $text := ternary "unconfined" "runtime/default" (eq $profile "Unconfined") }}
{{- $_ := set $annotations "container.apparmor.security.beta.kubernetes.io/nri-memtierd" $text }}
{{- end }}
{{- include "nri-memtierd.withoutNull" (merge (dict) (.Values.podAnnotations | default dict) $annotations) }}
{{- end }}

{{- define "nri-memtierd.index" -}}
{{- $index := ((.Values.nri | default dict).plugin | default dict).index }}
{{- printf "%02d" (int (ternary 90 $index (kindIs "invalid" $index))) }}
{{- end }}

{{- /* A mapping as YAML without the keys whose value is null: for Helm such a key is not there. Nothing, if none is left. */ -}}
{{- define "nri-memtierd.withoutNull" -}}
{{- $kept := dict }}
{{- range $key, $value := . }}
{{- if kindIs "map" $value }}{{ $_ := set $kept $key (include "nri-memtierd.withoutNull" $value | fromYaml) }}
{{- else if not (kindIs "invalid" $value) }}{{ $_ := set $kept $key $value }}{{ end }}
{{- end }}
{{- if $kept }}{{ toYaml $kept }}{{ end }}
{{- end }}
