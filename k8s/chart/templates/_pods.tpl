{{/* Parts that head and workers share. The reasons stand in k8s/base/rayservice.yaml. */}}
{{- define "emoe.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest }}{{ $image.repository }}@{{ $image.digest }}{{ else }}{{ $image.repository }}:{{ $image.tag | default .Chart.AppVersion }}{{ end -}}
{{- end }}

{{- define "emoe.confined" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
{{- end }}

{{- define "emoe.user" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 100
fsGroup: 100
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "emoe.part" -}}
app.kubernetes.io/part-of: {{ .Release.Name }}
{{- end }}

{{- define "emoe.env" -}}
- name: EMOE_API_KEY
  valueFrom: {secretKeyRef: {name: {{ .Values.keysSecret }}, key: api-key}}
- name: EMOE_ADMIN_API_KEY
  valueFrom: {secretKeyRef: {name: {{ .Values.keysSecret }}, key: admin-api-key}}
- {name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, value: "90"}
{{- end }}

{{- define "emoe.mounts" -}}
- {name: dshm, mountPath: /dev/shm}
- {name: cache, mountPath: /home/ray/.cache}
{{- if .Values.models.claim }}
- {name: models, mountPath: /models, readOnly: true}
{{- end }}
{{- end }}

{{/* A dictionary of root and of the sizes `shm` and `cache`. */}}
{{- define "emoe.volumes" -}}
- name: dshm
  emptyDir: {medium: Memory, sizeLimit: {{ .sizes.shm }}}
- name: cache
  emptyDir: {sizeLimit: {{ .sizes.cache }}}
{{- with .root.Values.models.claim }}
- name: models
  persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}
{{- end }}
{{- end }}
