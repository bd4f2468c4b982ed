"""How a student is made smaller: pure functions, one method per file, and what the callbacks that use them during training share."""
