//! Answers requests: collects what the machine is made of, and starts it.

use std::collections::HashMap;
use std::os::fd::OwnedFd;

use api_server::machine::{Machine, MachineError, MachineRequest};

use crate::machine::{self, Plan, Running};
use crate::{event_loop, logger};

/// One machine, before and after its start.
#[derive(Default)]
pub struct Controller {
    plan: Plan,
    taps: HashMap<String, OwnedFd>,
    running: Option<Running>,
}

impl Controller {
    /// A machine that takes the TAPs of these interfaces from descriptors handed in, and tells how
    /// long its guest took to boot where `boot_timer` is set.
    pub fn new(
        taps: HashMap<String, OwnedFd>,
        boot_timer: Option<std::time::Instant>,
    ) -> Controller {
        Controller { plan: Plan { boot_timer, ..Plan::default() }, taps, running: None }
    }

    /// Serves the machine until it ends; the process's exit status.
    pub fn serve(self) -> Result<i32, MachineError> {
        match self.running {
            Some(running) => {
                event_loop::run(running).map_err(|error| MachineError(error.to_string()))
            }
            None => Err(MachineError("the machine was not started".to_owned())),
        }
    }
}

impl Machine for Controller {
    fn handle(&mut self, request: MachineRequest) -> Result<(), MachineError> {
        let refuse = |message: String| Err(MachineError(message));
        if self.running.is_some() {
            return refuse(
                "The requested operation is not supported after starting the microVM.".to_owned(),
            );
        }
        let plan = &mut self.plan;
        match request {
            MachineRequest::PutBootSource(source) => {
                if let Some(text) = &source.boot_args {
                    arch::boot::check_command_line(text)
                        .map_err(|error| MachineError(error.to_string()))?;
                }
                plan.boot_source = Some(source);
            }
            MachineRequest::PutMachineConfig(config) => {
                config.check()?;
                plan.machine = config;
            }
            MachineRequest::PutDrive(drive) => {
                drive.check()?;
                let same =
                    |other: &&mut api_server::machine::Drive| other.drive_id == drive.drive_id;
                let second_root = drive.is_root_device
                    && plan
                        .drives
                        .iter()
                        .any(|other| other.is_root_device && other.drive_id != drive.drive_id);
                if second_root {
                    return refuse("A root block device already exists!".to_owned());
                }
                match plan.drives.iter_mut().find(same) {
                    Some(other) => *other = drive,
                    None => plan.drives.push(drive),
                }
            }
            MachineRequest::PutNetworkInterface(interface) => {
                interface.check()?;
                let tap = self.taps.remove(&interface.iface_id);
                plan.interfaces.retain(|(other, _)| other.iface_id != interface.iface_id);
                plan.interfaces.push((interface, tap));
            }
            MachineRequest::PutVsock(vsock) => {
                vsock.check()?;
                plan.vsock = Some(vsock);
            }
            MachineRequest::PutEntropy(entropy) => {
                entropy.check()?;
                plan.entropy = Some(entropy);
            }
            MachineRequest::PutConsole(console) => plan.console = console,
            MachineRequest::PutLogger(config) => {
                logger::init(&config).map_err(|error| MachineError(error.to_string()))?;
            }
            MachineRequest::StartInstance => {
                if let Some(name) = self.taps.keys().next() {
                    return refuse(format!(
                        "a TAP was handed in for {name}, which is no interface"
                    ));
                }
                let plan = std::mem::take(plan);
                let running =
                    machine::start(plan).map_err(|error| MachineError(error.to_string()))?;
                self.running = Some(running);
            }
        }
        Ok(())
    }
}
