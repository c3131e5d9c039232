"""The LightningModules, one per published method."""
