"""Mobile GPUs: OpenCL C for Mali and Adreno, WGSL for Vulkan."""
