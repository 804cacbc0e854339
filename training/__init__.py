"""The alignment pipeline: stages on transformers.Trainer and DeepSpeed around the fused loss."""
