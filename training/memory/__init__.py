"""The memory that a training step needs: `exo-fast memory`."""
