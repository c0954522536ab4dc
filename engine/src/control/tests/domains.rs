//! What a session may register depends on its isolation domain.

use pegaflow_shm::status::Status;

use super::{Rig, register, worker};
use crate::config::{Config, DomainRule};
use crate::control::fake_lane::Seen;
use crate::isolation::DomainRules;

#[test]
fn a_model_off_the_domains_list_is_refused_before_the_lane_hears_of_it() {
    let rule = DomainRule {
        name: "serving".into(),
        uids: vec![rustix::process::geteuid().as_raw()],
        gids: Vec::new(),
        namespaces: vec!["meta-llama/*".into()],
    };
    let config = Config {
        domains: vec![rule],
        ..Config::default()
    };
    let rig = Rig::with(|options| options.rules = DomainRules::of(&config));
    let (client, ..) = rig.session();
    let status = Status::PermissionDenied;
    client.is_failed(&register(worker(Vec::new())), status, "meta-llama/*");
    client.is_failed(&register(worker(Vec::new())), status, "serving");
    assert_eq!(rig.lane.seen(), vec![Seen::Opened(1)]);
}
