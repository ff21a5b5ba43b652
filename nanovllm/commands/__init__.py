"""The commands of `nanovllm`, a file each. Importing one loads no torch: a command does, once its options are read."""
