//! Which domains of libvirt name the images of a merge, and what they boot afterwards, in words.

use std::path::Path;

use qcow2::error::shown;
use qmp_client::libvirt::{After, Definitions, Images, Mention, Recorded, Virsh};

use crate::domains::command;
use crate::output::human::{list, printable};

/// The fields of the plan in words: each a title and its text.
pub(in crate::cmd) fn text(definitions: &Definitions, images: &Images<'_>) -> Vec<(&'static str, String)> {
    let mentions = images.named_in(definitions);
    let mut fields: Vec<_> = mentions.iter().map(|mention| ("libvirt", told(mention, images))).collect();
    if let Some((file, why)) = definitions.unread.first() {
        let more = match definitions.unread.len() - 1 {
            0 => String::new(),
            more => format!(", and {more} more"),
        };
        fields.push((
            "not known",
            format!(
                "whether a domain of libvirt names these images, as this could not be read: {} ({}){more}",
                shown(file),
                printable(why)
            ),
        ));
    }
    fields
}

fn told(mention: &Mention<'_>, images: &Images<'_>) -> String {
    let (domain, disk) = (mention.domain, mention.disk);
    let mut named = images.of_mention(mention).into_iter().map(|(file, _)| file);
    let first = named.next().map_or(String::new(), shown);
    let rest: Vec<&Path> = named.collect();
    let mut text =
        format!("the domain {} names {first} as {}", printable(&domain.name), printable(&disk.target));
    if !rest.is_empty() {
        text += &format!(", and records {}", list(rest));
    }
    text += &format!(" ({})", shown(&domain.definition));
    let edit = command(&Virsh::of(domain).command("edit", &[]));
    let warning = match images.after(mention) {
        After::Right if disk.recorded == Recorded::ActiveOnly => return text,
        After::Right => "it boots the right disk afterwards, with the chain that it records".to_owned(),
        After::OtherDisk(file) => format!("afterwards {} shows it what the merged chain shows", shown(&file)),
        After::Stale(files) => format!(
            "STALE: afterwards it would boot old data, as it records {}; take them out of its definition first: {edit}",
            list(&files)
        ),
        After::Missing(files) => format!(
            "afterwards it does not start until {} are taken out of its definition: {edit}",
            list(&files)
        ),
    };
    text + "\n" + &warning
}
