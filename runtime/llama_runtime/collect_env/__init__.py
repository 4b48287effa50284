"""What a bug report needs to say of the machine, its libraries and a bundle; nothing private."""
