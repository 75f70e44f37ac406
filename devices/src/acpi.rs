//! The ACPI tables that tell the guest what the machine has (ACPI 6.4): RSDP, XSDT, FADT, MADT, DSDT.
//!
//! The machine is hardware-reduced: no SCI, no fixed events, no legacy interrupt controller, no PM timer. The DSDT
//! names the serial port (PNP0501), the clock (PNP0B00), a power-off state and one LNRO0005 per virtio-mmio device.

use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, ONE, Package, Path, ResourceTemplate, Scope, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};

use crate::cmos::CENTURY_REGISTER;
use crate::layout;
use crate::power::SLEEP_TYPE_S5;

const OEM_ID: [u8; 6] = *b"ORRERY";
const OEM_TABLE_ID: [u8; 8] = *b"ORRERYV1";
const OEM_REVISION: u32 = 1;
/// Tables start at multiples of this many bytes.
const ALIGNMENT: usize = 64;

/// FADT IAPC_BOOT_ARCH: no VGA and no MSI; neither legacy devices nor a keyboard controller are claimed, the CMOS
/// clock is not denied.
const BOOT_ARCHITECTURE: u16 = 1 << 2 | 1 << 3;

/// Builds the tables of a machine whose virtio devices are in these slots. The bytes belong at
/// [`layout::ACPI_START`], which is then the address of the RSDP; they are no more than [`layout::ACPI_LEN`].
///
/// # Panics
///
/// If a slot does not exist, see [`layout::VIRTIO_SLOTS_MAX`].
pub fn tables(virtio_slots: &[u8]) -> Vec<u8> {
    let mut image = Image { bytes: vec![0; ALIGNMENT] };
    let dsdt = image.add(&dsdt(virtio_slots));
    let fadt = image.add(&fadt(dsdt));
    let madt = image.add(&madt());
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = image.add(&xsdt);
    let rsdp = bytes_of(&Rsdp::new(OEM_ID, xsdt));
    image.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    assert!(image.bytes.len() as u64 <= layout::ACPI_LEN, "the tables of all slots fit");
    image.bytes
}

/// The tables as they lie in memory.
struct Image {
    bytes: Vec<u8>,
}

impl Image {
    /// Appends a table and returns its guest-physical address.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
        let address = layout::ACPI_START + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        address
    }
}

fn bytes_of(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}

/// A byte-wide register in the port space.
fn port_register(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port))
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Headless)
        .flag(Flags::Wbinvd)
        .flag(Flags::ResetRegSup)
        // No power or sleep button of the fixed kind.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    fadt.century = CENTURY_REGISTER;
    fadt.reset_reg = port_register(layout::RESET_PORT);
    fadt.reset_value = layout::RESET_VALUE;
    fadt.sleep_control_reg = port_register(layout::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port_register(layout::SLEEP_STATUS_PORT);
    fadt.finalize()
}

fn madt() -> MADT {
    let local_apic = LocalInterruptController::Address(layout::LAPIC_START as u32);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, local_apic);
    madt.add_structure(ProcessorLocalApic::new(0, 0, EnabledStatus::Enabled));
    madt.add_structure(IoApic::new(layout::IOAPIC_ID, layout::IOAPIC_START as u32, 0));
    madt
}

fn dsdt(virtio_slots: &[u8]) -> Sdt {
    // The state that the guest writes with SLP_EN to power off: SLP_TYP for both of the registers of old.
    let s5 = Name::new("_S5_".into(), &Package::new(vec![&SLEEP_TYPE_S5, &SLEEP_TYPE_S5, &ZERO, &ZERO]));
    let mut devices = serial();
    devices.extend(clock());
    for slot in virtio_slots {
        devices.extend(virtio(*slot));
    }
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&bytes_of(&s5));
    dsdt.append_slice(&bytes_of(&Scope::new("_SB_".into(), vec![&Raw(devices)])));
    dsdt
}

/// AML that is already in bytes.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

fn serial() -> Vec<u8> {
    bytes_of(&Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 1, layout::SERIAL_PORTS as u8),
                    &Interrupt::new(true, true, false, false, u32::from(layout::SERIAL_GSI)),
                ]),
            ),
        ],
    ))
}

fn clock() -> Vec<u8> {
    bytes_of(&Device::new(
        "RTC_".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0B00")),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &IO::new(layout::CMOS_PORT, layout::CMOS_PORT, 1, layout::CMOS_PORTS as u8),
                    &Interrupt::new(true, true, false, false, u32::from(layout::CMOS_GSI)),
                ]),
            ),
        ],
    ))
}

fn virtio(slot: u8) -> Vec<u8> {
    assert!(slot < layout::VIRTIO_SLOTS_MAX, "virtio slot {slot} does not exist");
    let window = layout::virtio_window(slot) as u32;
    bytes_of(&Device::new(
        Path::new(&format!("VR{slot:02}")),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &slot),
            // DMA is coherent.
            &Name::new("_CCA".into(), &ONE),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, window, layout::VIRTIO_STRIDE as u32),
                    &Interrupt::new(true, false, false, false, u32::from(layout::virtio_gsi(slot))),
                ]),
            ),
        ],
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn word(bytes: &[u8], at: usize, len: usize) -> u64 {
        crate::value_of(&bytes[at..at + len])
    }

    /// The table at a guest-physical address, by its own length, its checksum verified.
    fn table(image: &[u8], address: u64) -> &[u8] {
        let start = (address - layout::ACPI_START) as usize;
        let table = &image[start..start + word(image, start + 4, 4) as usize];
        assert_eq!(sum(table), 0, "checksum of {:?}", &table[..4]);
        table
    }

    #[test]
    fn the_tables_lead_to_each_other() {
        let image = tables(&[0, 1, 2, 3]);
        assert_eq!(&image[..8], b"RSD PTR ");
        assert_eq!((sum(&image[..20]), sum(&image[..36])), (0, 0));
        let xsdt = table(&image, word(&image, 24, 8));
        assert_eq!(&xsdt[..4], b"XSDT");
        let fadt = table(&image, word(xsdt, 36, 8));
        assert_eq!(&fadt[..4], b"FACP");
        // HW_REDUCED_ACPI and RESET_REG_SUP; the reset register is port 0x602 and wants 1.
        assert_eq!(word(fadt, 112, 4) & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10);
        assert_eq!((fadt[116], word(fadt, 120, 8), fadt[128]), (1, 0x602, 1));
        assert_eq!((fadt[244], word(fadt, 248, 8)), (1, 0x600));
        let madt = table(&image, word(xsdt, 44, 8));
        assert_eq!(&madt[..4], b"APIC");
        assert_eq!(word(madt, 36, 4), 0xFEE0_0000);
        let dsdt = table(&image, word(fadt, 140, 8));
        assert_eq!(&dsdt[..4], b"DSDT");
        for name in [&b"_S5_"[..], b"COM1", b"RTC_", b"VR03", b"LNRO0005"] {
            assert!(dsdt.windows(name.len()).any(|window| window == name), "{name:?}");
        }
    }

    #[test]
    fn all_slots_fit() {
        let slots: Vec<u8> = (0..layout::VIRTIO_SLOTS_MAX).collect();
        assert!(tables(&slots).len() as u64 <= layout::ACPI_LEN);
    }
}
