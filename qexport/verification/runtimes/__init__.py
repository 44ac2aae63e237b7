"""The real runtimes: does what users will run compute what our decoded weights compute?"""
