"""What a process does beside its work: progress, a polite stop, several processes, devices and memory."""
