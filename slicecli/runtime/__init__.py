"""What surrounds the computation: devices, memory, processes, other libraries, input that anybody may have written."""
