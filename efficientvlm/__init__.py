"""Make a large vision-language model small and fast: shrink, distill, prune, finetune."""
