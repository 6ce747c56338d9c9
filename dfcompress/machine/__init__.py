"""What the machine can do, and how a job uses it; the only room that names CUDA."""
