"""What the processes of a job do: build the parts, train, evaluate, generate, export; and how those processes are started."""
