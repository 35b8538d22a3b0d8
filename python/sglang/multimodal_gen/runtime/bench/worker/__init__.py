"""What a benchmark's child processes run; torch, and diffusers where it is compared with, load here alone."""
