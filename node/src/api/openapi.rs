//! The API's description of itself: `/openapi.json`, OpenAPI 3.1.

use axum::Json;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa::{Modify, OpenApi};

use super::{lease, model, node, operator, payload, quarantine};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Leasehold node",
        description = "Capacity of a fabric's hosts, leased, used and proven. Money is a decimal \
            text in the fabric's currency, spans end in _ms, sizes are bytes, instants are RFC \
            3339 in UTC. Every request needs a Host header that names the node's own address or \
            localhost.",
        license(name = "MIT OR Apache-2.0", identifier = "MIT OR Apache-2.0"),
        contact(),
    ),
    paths(
        node::healthz, node::readyz, node::metrics, document,
        node::info, node::list, node::offers,
        payload::upload, payload::list, payload::download, payload::holders, payload::fetch,
        payload::remove, payload::pin, payload::unpin,
        payload::keep_private, payload::publish, payload::verify, payload::clone,
        lease::plan, lease::order, lease::request, lease::list, lease::show, lease::claim,
        lease::release, lease::end, lease::output, lease::file, lease::receipts, lease::proof,
        lease::jobs, lease::renew, lease::gang,
        quarantine::list, quarantine::reinstate,
        operator::reclaim, operator::drain, operator::resume, operator::revoke,
        model::list, model::put, model::remove, model::keys, model::add_key, model::remove_key,
    ),
    security(("token" = [])),
    modifiers(&Token),
    tags(
        (name = "health", description = "Is it well"),
        (name = "nodes", description = "Who is there and what they offer"),
        (name = "payloads", description = "Bytes named by their BLAKE3 root"),
        (name = "leases", description = "Order, use, follow, renew, release, prove"),
        (name = "models", description = "Models of this node, and who may ask them"),
        (name = "operator", description = "Take capacity back, empty the host, sell again"),
    ),
)]
struct Document;

struct Token;

impl Modify for Token {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let scheme = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
        let components = document.components.get_or_insert_with(Default::default);
        components.add_security_scheme("token", scheme);
    }
}

/// This description
#[utoipa::path(get, path = "/openapi.json", tag = "health", security(()), responses(
    (status = 200, body = Object)))]
pub(super) async fn document() -> Json<utoipa::openapi::OpenApi> {
    Json(Document::openapi())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// The description as it is kept beside the sources: a change of the API shows in review.
    const KEPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/openapi.json");

    #[test]
    fn every_route_is_described_and_every_description_is_served() {
        let document = serde_json::to_value(Document::openapi()).expect("JSON");
        let mut described = BTreeSet::new();
        for (path, item) in document["paths"].as_object().expect("paths") {
            for method in item.as_object().expect("methods").keys() {
                described.insert(format!("{method} {path}"));
            }
        }
        let served: BTreeSet<_> = super::super::routes()
            .iter()
            .flat_map(|route| route.methods.iter().map(|method| format!("{method} {}", route.path)))
            .collect();
        assert_eq!(described, served);
    }

    #[test]
    fn what_needs_no_token_says_so() {
        let document = serde_json::to_value(Document::openapi()).expect("JSON");
        for (path, item) in document["paths"].as_object().expect("paths") {
            for (method, operation) in item.as_object().expect("methods") {
                let open = operation["security"] == serde_json::json!([{}]);
                let meant = super::super::guard::OPEN.contains(&path.as_str());
                assert_eq!(open, meant, "{method} {path}");
            }
        }
    }

    #[test]
    fn the_kept_description_is_the_served_one() {
        let served = Document::openapi().to_pretty_json().expect("JSON") + "\n";
        if std::env::var_os("LEASEHOLD_UPDATE_OPENAPI").is_some() {
            std::fs::write(KEPT, &served).expect("written");
        }
        let kept = std::fs::read_to_string(KEPT).unwrap_or_default();
        assert!(
            kept == served,
            "docs/openapi.json differs: run this test with LEASEHOLD_UPDATE_OPENAPI=1, then read \
             the difference"
        );
    }
}
