"""TRL's own tests and a DPO training of TRL, with exo_fast put in."""
