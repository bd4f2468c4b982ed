"""Where a teacher's targets come from, what each way costs, and the writing of a store."""
