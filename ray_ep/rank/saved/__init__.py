"""What a run keeps: checkpoints in logical (layer, expert) form, and exports of them."""
