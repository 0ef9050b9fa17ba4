{{/* Name of everything that the release has one of. */}}
{{- define "tuneserve.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Labels by which the operator's pods are found; they can never change. */}}
{{- define "tuneserve.selectorLabels" -}}
app.kubernetes.io/name: tuneserve
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end -}}

{{- define "tuneserve.labels" -}}
{{ include "tuneserve.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "tuneserve.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "tuneserve.name" .) -}}
{{- else -}}
{{- required "serviceAccount.name must name an account that exists when serviceAccount.create is false" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "tuneserve.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{/* A copy of a map without what is left empty: absent and empty mean the same to the operator. */}}
{{- define "tuneserve.withoutEmpty" -}}
{{- $kept := dict -}}
{{- range $key, $value := . -}}
{{- if or (kindIs "bool" $value) (kindIs "float64" $value) (kindIs "int64" $value) $value -}}
{{- $_ := set $kept $key $value -}}
{{- end -}}
{{- end -}}
{{- toYaml $kept -}}
{{- end -}}

{{/* The operator's configuration file. */}}
{{- define "tuneserve.config" -}}
{{- if not (index .Values.profiles .Values.defaultProfile) -}}
{{- fail (printf "defaultProfile %q is none of the profiles: %s" .Values.defaultProfile (keys .Values.profiles | sortAlpha | join ", ")) -}}
{{- end -}}
{{- if and (gt (int .Values.replicas) 1) (not .Values.leaderElection.enabled) -}}
{{- fail "replicas must be 1 when leaderElection.enabled is false: several operators need a leader" -}}
{{- end -}}
{{- $trainer := .Values.images.trainer | default (printf "tuneserve/trainer:%s" .Chart.AppVersion) -}}
{{- $server := .Values.images.server | default (printf "tuneserve/server:%s" .Chart.AppVersion) -}}
profiles:
{{- range $name := keys .Values.profiles | sortAlpha }}
{{- $profile := index $.Values.profiles $name }}
{{- if $profile }}
{{- $own := $profile.images | default dict }}
{{- $images := dict "trainer" ($own.trainer | default $trainer) "server" ($own.server | default $server) }}
{{- $default := eq $name $.Values.defaultProfile }}
{{- $told := merge (dict "name" $name "default" $default "images" $images) (omit $profile "images") }}
- {{ include "tuneserve.withoutEmpty" $told | nindent 2 | trim }}
{{- end }}
{{- end }}
{{- with .Values.hub.endpoint }}
hub:
  endpoint: {{ . | quote }}
{{- end }}
artifacts:
  {{- include "tuneserve.withoutEmpty" .Values.artifacts | nindent 2 }}
leaderElection:
  leaseName: {{ include "tuneserve.name" . }}
  {{- toYaml .Values.leaderElection | nindent 2 }}
{{- with .Values.watchNamespaces }}
watchNamespaces:
  {{- toYaml . | nindent 2 }}
{{- end }}
workers: {{ int .Values.workers }}
progressIntervalSeconds: {{ int .Values.progressIntervalSeconds }}
resyncSeconds: {{ int .Values.resyncSeconds }}
{{- end -}}

{{/* All that the operator may do to the objects of the namespaces that it looks after: a rule for each thing it does. */}}
{{- define "tuneserve.rules" -}}
- apiGroups: [tuneserve.dev]
  resources: [finetunes, modelserves]
  verbs: [get, list, watch]
- apiGroups: [tuneserve.dev]
  resources: [finetunes/status, modelserves/status]
  verbs: [patch]
# To own objects in a way that blocks the deletion of the owner.
- apiGroups: [tuneserve.dev]
  resources: [finetunes/finalizers, modelserves/finalizers]
  verbs: [update]
# The stages.
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch]
# What a stage is told; and the data sets that users keep in ConfigMaps.
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get, list, create, patch, delete]
# Artifacts. Never deleted: that is left to their owner, or to the user.
- apiGroups: [""]
  resources: [persistentvolumeclaims]
  verbs: [get, create, patch]
# The servers.
- apiGroups: [apps]
  resources: [deployments]
  verbs: [get, list, watch, create, patch]
- apiGroups: [""]
  resources: [services]
  verbs: [get, create, patch]
- apiGroups: [events.k8s.io]
  resources: [events]
  # Listed: those about a pod that does not start, by its UID, to say why.
  verbs: [get, list, create, patch]
{{- end -}}
