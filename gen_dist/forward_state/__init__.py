"""A forward pass that changes nothing: restores what modules move while they run, and all random numbers.

Modules keep state in many places: buffers, a teacher's weights, plain attributes, lists, dicts, objects. What is in
reach of the model, of the criterion and of a closure is saved before the pass; a module that nobody knew of is saved
when it begins to run. Names and containers are saved by identity. Contents of tensors are copied, but for parameters
that do not move along the line and outweigh those that do (the base of LoRA): these are copied when they are written.
"""

from gen_dist.forward_state.state import Restart, forward_state_kept

__all__ = ["Restart", "forward_state_kept"]
