"""Knowledge distillation: objectives, ov-freeze, and the jitted training step."""
