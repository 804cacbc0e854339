"""The first run on a GPU: `exo-fast gpu` and `make gpu-first`. What each step answers: docs/gpu.md."""
