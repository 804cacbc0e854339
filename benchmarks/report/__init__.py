"""Results as documents: the table and the plots of each suite."""
