"""Training of Llama-like models on rows laid end to end: the fast path of `train` on a GPU.

The decoder layer is ours, as one compiled function over the weights of the transformers model, with the adapters inside
the fused products, and a step is one CUDA graph. It must compute what the plain path computes, to the precision of
bfloat16, and leave checkpoints, schedules and everything else to the trainer.
"""
