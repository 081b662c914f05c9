"""From a Program to kernels and a memory plan, in named steps that can be called and looked at one by one."""

# In order; `edgec compile --stop-after` and `--dump` use these names.
STEPS = ("regions", "layout", "legalize", "import", "kernels", "plan")
