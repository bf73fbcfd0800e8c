//! One run on several devices: a process for each, which sees a part of every step's examples and sums its gradients with the
//! others' (data parallel).
//!
//! - [`World`]: who this process is, from the variables that torchrun, Slurm's and Kubernetes' launchers set for PyTorch.
//! - [`Group`]: the processes found one another. Small messages and, where devices cannot talk to each other, gradients go over
//!   TCP through rank 0.
//!
//! Invariants: every rank takes the same decisions, because whatever decides is gathered first, in the order of the ranks. Sums are
//! added in that order too, so the same number of ranks gives the same run. Only rank 0 writes files. A rank that dies ends the
//! others with an error that names it; what rank 0 saved before is whole.

mod group;
mod wire;
mod world;

pub use group::Group;
pub use world::World;
