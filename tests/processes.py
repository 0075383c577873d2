"""Processes of tests, forked from one that has imported torch: that takes seconds each time."""

import multiprocessing
import os
import socket

import torch.multiprocessing as mp

multiprocessing.set_forkserver_preload(["torch", "kdkernels", "pytest", "hypothesis"])


def free_port():
    """Below those that the system hands out, and from another place on than other workers."""
    for port in range(20_000 + os.getpid() % 10_000, 32_768):
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no port is free")


def ranks(function, world, *arguments):
    """function(rank, world, port, *arguments) in `world` processes."""
    mp.start_processes(
        function, (world, free_port(), *arguments), nprocs=world, start_method="forkserver"
    )


def fresh(function, *arguments):
    """What function(pipe, *arguments) sends from a process of its own."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=function, args=(theirs, *arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()
