"""Many runs, and looking inside one."""
