{{- define "nri-memtierd.selector" -}}
app.kubernetes.io/name: nri-memtierd
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "nri-memtierd.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "nri-memtierd.selector" . }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- /* Directories where anyone can put a link: the program makes its own below them, so that no link is followed. */ -}}
{{- define "nri-memtierd.outputBelow" -}}
{{- if has (dir (clean .Values.outputDir)) (list "/tmp" "/var/tmp" "/dev/shm") }}{{ dir (clean .Values.outputDir) }}{{ end }}
{{- end }}

{{- define "nri-memtierd.runDir" -}}
{{- if not .Values.outputDir }}/var/run/nri-memtierd
{{- else if include "nri-memtierd.outputBelow" . }}/run-dir/{{ base (clean .Values.outputDir) }}
{{- else }}/run-dir
{{- end }}
{{- end }}
