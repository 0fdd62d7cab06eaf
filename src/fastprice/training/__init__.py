"""Training: TRL's trainer on packs, with callbacks, auxiliary losses and CUDA graphs."""
