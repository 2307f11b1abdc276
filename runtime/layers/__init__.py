"""What a stage's time and memory are spent on inside its engine, layer by layer."""
