#!/usr/bin/env bash
# The whole of MPO on a bare machine; arrives with the pipeline.
echo "error: the quickstart is not here yet: it needs the pipeline (python -m mpo_jax.main)" >&2
exit 1
