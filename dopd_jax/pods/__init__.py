"""What `compile_check` needs to compile a run for a machine that is not there, and to judge it.

topologies  TPU topologies and their chips, and a CPU that poses as several
shapes      a run as shapes: models, state and batches without memory
hlo         what a compiled program's text says: collectives, largest arrays
flops       FLOPs of the programs, counted from shapes
proposals   what would make a run fit
table       the report for a person
"""
