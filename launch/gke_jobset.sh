#!/usr/bin/env bash
# Trains on GPU nodes of a Kubernetes cluster with JobSet, one pod a node;
# arguments are those of `dsv3 train`.
#
#   NAME=run IMAGE=IMAGE CLAIM=CLAIM PROCESSES=4 launch/gke_jobset.sh \
#     --config=FILE --workdir=/runs/DIR
#
# IMAGE      has the project installed
# CLAIM      a volume claim that all pods may write, mounted at /runs
# PROCESSES  pods (1)
# GPUS       of each (8)
# RESTARTS   how often the job may start again, from its last step, after a pod
#            was stopped, crashed or hung (9)
# DRY_RUN=1  prints the manifest
set -euo pipefail

NAME=${NAME:?is that of the job}
PORT=8476

manifest() {
  cat << EOF
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: "$NAME"
spec:
  failurePolicy:
    maxRestarts: ${RESTARTS:-9}
    rules:
    - action: FailJobSet  # see docs/training.md, exit codes
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: workers
    replicas: 1
    template:
      spec:
        completionMode: Indexed
        completions: ${PROCESSES:-1}
        parallelism: ${PROCESSES:-1}
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes: {operator: In, values: [2, 76, 77]}
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 300
            containers:
            - name: dsv3
              image: "${IMAGE:?has the project installed}"
              command: [dsv3, train]
              args:
EOF
  python3 -c 'import json, sys
for word in sys.argv[1:]: print("              -", json.dumps(word))' "$@"
  cat << EOF
              env:
              - name: JAX_COORDINATOR_ADDRESS
                value: "$NAME-workers-0-0.$NAME:$PORT"
              - name: JAX_NUM_PROCESSES
                value: "${PROCESSES:-1}"
              - name: JAX_PROCESS_ID
                valueFrom:
                  fieldRef:
                    fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']
              ports:
              - containerPort: $PORT
              resources:
                limits:
                  nvidia.com/gpu: ${GPUS:-8}
              volumeMounts:
              - {name: runs, mountPath: /runs}
            volumes:
            - name: runs
              persistentVolumeClaim:
                claimName: "${CLAIM:?is a volume claim that all pods may write}"
EOF
}

jobset=$(manifest "$@")
if [[ -n ${DRY_RUN:-} ]]; then
  echo "$jobset"
  exit
fi
kubectl apply -f - <<< "$jobset"
