"""Times predicted from flops and bytes, for GPUs that were not measured."""
