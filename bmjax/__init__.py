"""bmjax: make a big model small inside one jitted, sharded train step, and prove that it is not worse."""
