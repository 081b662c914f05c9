"""From a Program to kernels and a memory plan, in named steps that can be called and looked at one by one."""
