//! Messages of PCI functions on their way to the guest's processors: an eventfd of each vector, and
//! KVM's table of what each interrupt means (KVM API, `KVM_IRQFD` and `KVM_SET_GSI_ROUTING`).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use arch::layout;
use devices::pci::msix::MsiSink;
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use crate::StartError;
use crate::machine::lock;

/// First interrupt that no interrupt controller has a pin for.
const FIRST_MESSAGE: u32 = layout::LAST_PIN + 1;
/// Entries of KVM's table, at most (`KVM_MAX_IRQ_ROUTES`).
const MAX_ROUTES: usize = 4096;
/// Pins of a PIC.
const PIC_PINS: u32 = 8;

/// What a processor is to see written, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Message {
    address: u64,
    data: u32,
}

/// KVM's table of interrupts: the pins of the interrupt controllers, and messages.
pub struct Routing {
    vm: Arc<VmFd>,
    /// By interrupt; none where it is taken and its message not known yet.
    messages: Mutex<BTreeMap<u32, Option<Message>>>,
}

impl Routing {
    /// The table that KVM makes with the interrupt controllers.
    pub fn new(vm: Arc<VmFd>) -> Routing {
        Routing { vm, messages: Mutex::default() }
    }

    /// Takes the lowest free interrupt; `None` where the table could not hold it.
    fn take(&self) -> Option<u32> {
        take(&mut lock(&self.messages))
    }

    fn set(&self, gsi: u32, message: Message) -> Result<(), StartError> {
        set(&mut lock(&self.messages), gsi, message, |table| {
            let failed = StartError::device::<vmm_sys_util::fam::Error>;
            let table = KvmIrqRouting::from_entries(table).map_err(failed("MSI"))?;
            self.vm.set_gsi_routing(&table).map_err(StartError::kvm("KVM_SET_GSI_ROUTING"))
        })
    }

    /// An interrupt that nothing raises any more is free. It leaves KVM's table with the next change.
    fn free(&self, gsi: u32) {
        lock(&self.messages).remove(&gsi);
    }
}

fn take(messages: &mut BTreeMap<u32, Option<Message>>) -> Option<u32> {
    let pins = table(&BTreeMap::new()).len();
    let gsi = (FIRST_MESSAGE..).find(|gsi| !messages.contains_key(gsi))?;
    (pins + messages.len() < MAX_ROUTES).then(|| messages.insert(gsi, None))?;
    Some(gsi)
}

/// Has a table put in place in which an interrupt means this; where that is refused, it means what it
/// did. KVM knows no change of a single entry, so that one message which cannot be would otherwise
/// keep all others out from then on.
fn set<E>(
    messages: &mut BTreeMap<u32, Option<Message>>,
    gsi: u32,
    message: Message,
    install: impl FnOnce(&[kvm_irq_routing_entry]) -> Result<(), E>,
) -> Result<(), E> {
    let before = messages.insert(gsi, Some(message)).flatten();
    install(&table(messages)).inspect_err(|_| {
        messages.insert(gsi, before);
    })
}

/// The whole table. Of the pins it says what KVM says by default: each interrupt is the I/O APIC's pin
/// of the same number, and the first sixteen are the PICs' as well.
fn table(messages: &BTreeMap<u32, Option<Message>>) -> Vec<kvm_irq_routing_entry> {
    let pin = |gsi, irqchip, pin| kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            irqchip: kvm_irq_routing_irqchip { irqchip, pin },
        },
        ..Default::default()
    };
    let mut entries = Vec::new();
    for gsi in 0..=layout::LAST_PIN {
        entries.push(pin(gsi, KVM_IRQCHIP_IOAPIC, gsi));
        match gsi / PIC_PINS {
            0 => entries.push(pin(gsi, KVM_IRQCHIP_PIC_MASTER, gsi)),
            1 => entries.push(pin(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - PIC_PINS)),
            _ => {}
        }
    }
    for (gsi, message) in messages {
        let Some(Message { address, data }) = *message else { continue };
        let msi = kvm_irq_routing_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data,
            ..Default::default()
        };
        entries.push(kvm_irq_routing_entry {
            gsi: *gsi,
            type_: KVM_IRQ_ROUTING_MSI,
            u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
            ..Default::default()
        });
    }
    entries
}

/// The vectors of one function. Its interrupts are free again when it is dropped.
pub struct Vectors {
    routing: Arc<Routing>,
    vectors: Vec<(EventFd, u32)>,
}

impl Vectors {
    /// So many vectors, none of which means anything yet. Fails where there are no more interrupts or
    /// eventfds.
    pub fn new(routing: Arc<Routing>, count: u16) -> Result<Vectors, StartError> {
        let mut all = Vectors { routing, vectors: Vec::new() };
        for _ in 0..count {
            let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
                .map_err(StartError::host("eventfd"))?;
            let gsi = all.routing.take().ok_or(StartError::TooManyDevices(MAX_ROUTES))?;
            let registered = all.routing.vm.register_irqfd(&event, gsi);
            all.vectors.push((event, gsi));
            registered.map_err(StartError::kvm("KVM_IRQFD"))?;
        }
        Ok(all)
    }
}

impl MsiSink for Vectors {
    fn route(&self, vector: u16, address: u64, data: u32) {
        let Some((_, gsi)) = self.vectors.get(usize::from(vector)) else { return };
        // KVM refuses an address that no processor is at.
        if let Err(error) = self.routing.set(*gsi, Message { address, data }) {
            tracing::debug!(vector, address, data, %error, "no such message");
        }
    }

    fn trigger(&self, vector: u16) {
        if let Some((event, _)) = self.vectors.get(usize::from(vector)) {
            // Where the counter is full the interrupt is pending anyway.
            let _ = event.write(1);
        }
    }
}

impl Drop for Vectors {
    fn drop(&mut self) {
        for (event, gsi) in &self.vectors {
            let _ = self.routing.vm.unregister_irqfd(event, *gsi);
            self.routing.free(*gsi);
        }
    }
}

#[cfg(test)]
#[allow(unsafe_code, reason = "reads unions of KVM's")]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// Interrupt, controller, pin.
    fn pins(table: &[kvm_irq_routing_entry]) -> Vec<(u32, u32, u32)> {
        let pins = table.iter().filter(|entry| entry.type_ == KVM_IRQ_ROUTING_IRQCHIP);
        // SAFETY: the type says that it is this member.
        pins.map(|entry| (entry.gsi, unsafe { entry.u.irqchip }))
            .map(|(gsi, pin)| (gsi, pin.irqchip, pin.pin))
            .collect()
    }

    #[test]
    fn the_pins_of_the_interrupt_controllers_stay_as_kvm_has_them() {
        let table = table(&BTreeMap::new());
        let pins = pins(&table);
        assert_eq!((table.len(), pins.len()), (40, 40));
        for gsi in 0..24 {
            assert!(pins.contains(&(gsi, KVM_IRQCHIP_IOAPIC, gsi)));
        }
        for (gsi, chip, pin) in [
            (0, KVM_IRQCHIP_PIC_MASTER, 0),
            (7, KVM_IRQCHIP_PIC_MASTER, 7),
            (8, KVM_IRQCHIP_PIC_SLAVE, 0),
            (15, KVM_IRQCHIP_PIC_SLAVE, 7),
        ] {
            assert!(pins.contains(&(gsi, chip, pin)), "{gsi}");
        }
        assert!(!pins.iter().any(|(gsi, chip, _)| *gsi > 15 && *chip != KVM_IRQCHIP_IOAPIC));
    }

    /// docs/hostile.md 9: a guest's table may hold anything.
    #[test]
    fn hostile_9_a_message_that_is_refused_keeps_no_other_out() {
        let mut messages = BTreeMap::new();
        let gsis = [take(&mut messages).unwrap(), take(&mut messages).unwrap()];
        let good = Message { address: 0xfee0_0000, data: 0x4020 };
        let bad = Message { address: 0xff_0000_0000, data: 0 };
        let refuse = |table: &[kvm_irq_routing_entry]| {
            let is_bad = |entry: &kvm_irq_routing_entry| {
                // SAFETY: the type says that it is this member.
                entry.type_ == KVM_IRQ_ROUTING_MSI && unsafe { entry.u.msi }.address_hi == 0xff
            };
            if table.iter().any(is_bad) { Err(()) } else { Ok(()) }
        };
        assert_eq!(set(&mut messages, gsis[0], bad, refuse), Err(()));
        assert_eq!(set(&mut messages, gsis[1], good, refuse), Ok(()));
        assert_eq!(set(&mut messages, gsis[1], bad, refuse), Err(()));
        assert_eq!(messages, BTreeMap::from([(gsis[0], None), (gsis[1], Some(good))]));
    }

    proptest! {
        /// Whatever comes and goes, an interrupt is one function's, and no pin's.
        #[test]
        fn the_lowest_interrupt_that_is_free_is_taken(steps in vec(any::<(bool, u8)>(), 0..200)) {
            let mut messages = BTreeMap::new();
            for (takes, which) in steps {
                if takes {
                    let before: Vec<u32> = messages.keys().copied().collect();
                    let lowest = (FIRST_MESSAGE..).find(|gsi| !before.contains(gsi));
                    prop_assert_eq!(take(&mut messages), lowest);
                    prop_assert_eq!(messages.len(), before.len() + 1);
                } else if !messages.is_empty() {
                    let which = usize::from(which) % messages.len();
                    let gsi = *messages.keys().nth(which).unwrap();
                    messages.remove(&gsi);
                }
            }
        }
    }

    #[test]
    fn only_messages_that_are_known_are_in_the_table() {
        let mut messages = BTreeMap::new();
        assert_eq!([take(&mut messages), take(&mut messages)], [Some(24), Some(25)]);
        messages.insert(25, Some(Message { address: 0x1_fee0_1000, data: 0x4031 }));
        let table = table(&messages);
        let last = table.last().unwrap();
        assert_eq!((table.len(), last.gsi, last.type_), (41, 25, KVM_IRQ_ROUTING_MSI));
        // SAFETY: the type says that it is this member.
        let msi = unsafe { last.u.msi };
        assert_eq!((msi.address_hi, msi.address_lo, msi.data), (1, 0xfee0_1000, 0x4031));
    }

    #[test]
    fn interrupts_are_used_again_and_end_somewhere() {
        let mut messages = BTreeMap::new();
        let count = (0..).take_while(|_| take(&mut messages).is_some()).count();
        assert_eq!(count, MAX_ROUTES - 40);
        messages.remove(&100);
        assert_eq!([take(&mut messages), take(&mut messages)], [Some(100), None]);
    }
}
