//! What a run needs from the object that carries out a merge.

use std::cell::RefCell;
use std::time::Duration;

use crate::block::jobs::{JobState, Waited, Watch};
use crate::error::Result;
use crate::live::discover::Files;
use crate::live::outline::Outline;
use crate::live::tidy::{self, Tidied, TidyOptions};
use crate::live::verdict::Switched;
use crate::live::{Merge, Throttle};
use crate::qmp::connection::Connection;

/// A merge that is under way, as it is driven to its end. [`Merge`] is one, over QMP.
pub trait Driver {
    /// What is merged, and how far it is.
    fn outline(&self) -> Outline;

    /// The process of QEMU, where it runs on this host.
    fn process(&self) -> Option<u32>;

    /// Waits until all is copied. With a throttle, the guest is slowed down as long as the copy does not catch up with it.
    ///
    /// # Errors
    /// Those of the queries; the job goes on then.
    fn wait(
        &mut self,
        throttle: Option<&Throttle>,
        timeout: Option<Duration>,
        watch: &mut dyn FnMut(Copying<'_>) -> Watch,
    ) -> Result<Waited>;

    /// Switches the header of the overlay above top, durably.
    ///
    /// # Errors
    /// As [`Merge::finish`].
    fn finish(&mut self) -> Result<()>;

    /// Lets the guest go on with base.
    ///
    /// # Errors
    /// As [`Merge::pivot`].
    fn pivot(&mut self) -> Result<()>;

    /// Leaves the guest where it is, and base with what the disk showed.
    ///
    /// # Errors
    /// As [`Merge::keep_overlay`].
    fn keep_overlay(&mut self) -> Result<()>;

    /// Ends the job without its effect.
    ///
    /// # Errors
    /// As [`Merge::cancel`].
    fn cancel(&mut self) -> Result<()>;

    /// Removes the obsolete files of the merge, or makes them empty overlays on base, as far as QEMU has closed
    /// them. A merge that has not switched is left alone.
    fn tidy(&self, options: &TidyOptions) -> Tidied;

    /// Forgets the merge: nothing is left to be done.
    ///
    /// # Errors
    /// As [`Merge::done`].
    fn done(&mut self) -> Result<()>;
}

/// What is told while a merge copies.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Copying<'a> {
    /// How far the job is.
    Job(&'a JobState),
    /// The guest's writes are limited to so many bytes per second.
    Limited(u64),
}

impl Driver for Merge<'_, Connection> {
    fn outline(&self) -> Outline {
        Outline::of(self.file(), self.state())
    }

    fn process(&self) -> Option<u32> {
        self.monitor().peer()
    }

    fn wait(
        &mut self,
        throttle: Option<&Throttle>,
        timeout: Option<Duration>,
        watch: &mut dyn FnMut(Copying<'_>) -> Watch,
    ) -> Result<Waited> {
        let Some(throttle) = throttle else {
            return Merge::wait(self, timeout, &mut |progress| watch(Copying::Job(progress.job)));
        };
        let watch = RefCell::new(watch);
        self.wait_converging(
            throttle,
            timeout,
            &mut |progress| watch.borrow_mut()(Copying::Job(progress.job)),
            &mut |limit| {
                watch.borrow_mut()(Copying::Limited(limit));
            },
        )
    }

    fn finish(&mut self) -> Result<()> {
        Merge::finish(self).map(drop)
    }

    fn pivot(&mut self) -> Result<()> {
        Merge::pivot(self).map(drop)
    }

    fn keep_overlay(&mut self) -> Result<()> {
        Merge::keep_overlay(self).map(drop)
    }

    fn cancel(&mut self) -> Result<()> {
        Merge::cancel(self)
    }

    fn tidy(&self, options: &TidyOptions) -> Tidied {
        let files = Files::of(self.monitor());
        let options = TidyOptions { delete: options.delete || self.state().delete, ..options.clone() };
        Switched::noted(self.state())
            .map_or_else(Tidied::default, |leave| tidy::after(leave, &files, &options))
    }

    fn done(&mut self) -> Result<()> {
        Merge::done(self)
    }
}
