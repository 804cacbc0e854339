"""TRL's own tests and a DPO training of TRL, both run with exo_fast."""
